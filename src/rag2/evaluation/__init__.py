"""Log-likelihoods of the choices of questions -> accuracies, intervals, paired tests, report."""
