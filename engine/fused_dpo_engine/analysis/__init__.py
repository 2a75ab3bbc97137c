"""Questions about models, data and runs that are answered without training: what memory a step takes."""
