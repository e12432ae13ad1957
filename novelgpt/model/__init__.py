"""Loading a base through AutoModel, and the small embedded base."""
