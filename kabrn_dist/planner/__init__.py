"""What a configuration needs: parameters, memory, tokens."""
