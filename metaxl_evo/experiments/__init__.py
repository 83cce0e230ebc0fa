"""Methods x cases x seeds: how a study is planned, made, compared and reported, whatever its task."""
