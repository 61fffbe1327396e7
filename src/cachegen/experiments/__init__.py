"""Experiments of the paper: a module for each figure or table, and their outcomes as data, a page and a document."""
