"""The oracle: another implementation's numbers are compared with GPT-2's, and the mistake in it is named."""
