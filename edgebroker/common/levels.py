"""The levels of the tree, from the top down."""

LEVELS = ("root", "l2", "l3", "pos", "local")
