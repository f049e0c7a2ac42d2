"""Approximate Bayesian computation: see approximate_bayes.py, whose name does not shadow the standard library's abc."""

from approximate_bayes import main

if __name__ == "__main__":
    main()
