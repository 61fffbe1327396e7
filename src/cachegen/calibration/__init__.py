"""Learn about a model, from some of its caches, what method `transform` needs: the profile."""
