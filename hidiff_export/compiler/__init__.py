"""From a recipe to a bundle: the stages, and the folder that they write into."""
