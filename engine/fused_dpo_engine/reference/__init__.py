"""Log-probs of the frozen model: computed once, kept in a store, tried before they are taken from elsewhere."""
