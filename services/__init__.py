"""The processes of the stack, one package each; they never import each other."""
