"""The index that training searches, made anew while the weights move."""
