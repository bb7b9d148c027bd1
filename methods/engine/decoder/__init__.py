"""Find and swap the parts of a Hugging Face decoder."""
