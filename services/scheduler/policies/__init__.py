"""The rules of placement: filters that exclude hosts and weights that order the others."""
