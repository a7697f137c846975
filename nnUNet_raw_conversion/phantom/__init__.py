"""A numerical patient: whole-body PET/CT with true lesion labels, drawn from a seed, for tests and demos."""
