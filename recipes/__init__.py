"""Recipes that produced files of the package. They are part of the repository and are not installed with the package."""
