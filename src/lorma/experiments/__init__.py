"""Many runs: comparisons and their budgets."""
