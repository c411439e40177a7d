"""How explainable is a model? Methods, measures, training recipes, and the runner over all of them."""
