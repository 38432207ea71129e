"""Coverage-guided fuzzing of whatever reads bytes from strangers; see README.md."""
