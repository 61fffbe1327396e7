"""Where encoded contexts are kept and found: stores of immutable objects, their manifests and their catalog."""
