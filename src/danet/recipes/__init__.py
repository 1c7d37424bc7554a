"""The built-in recipes: YAML, one file each."""
