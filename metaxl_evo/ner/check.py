def check_experiment(*a): raise NotImplementedError
