"""Recipes that produced files of the package. They are kept in the repository and are not installed with it."""
