"""The oracle: compare another implementation's numbers with GPT-2's, and name its mistakes."""
