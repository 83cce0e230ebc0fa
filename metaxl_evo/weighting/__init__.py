"""Which data to train on: weights of examples and mixtures of domains, learned for any Hugging Face text model."""
