"""Every estimator side by side: what it costs, how much memory it takes, how near it is to the exact hypergradient."""
