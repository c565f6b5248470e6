"""Scaling studies: many sizes, each trained to several budgets, measured and fitted."""
