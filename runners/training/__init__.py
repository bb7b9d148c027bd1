"""Run the stages of a method's recipe."""
