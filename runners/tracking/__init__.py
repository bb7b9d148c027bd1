"""Mirror a run to W&B or TensorBoard."""
