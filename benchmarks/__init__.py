"""Commands that compare Tidegate with plain vLLM, side by side on the same engine settings and in the same run."""
