"""Public data sets, each from its own files as downloaded -> questions and documents."""
