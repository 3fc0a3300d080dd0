"""The exported graph: captured from a module, followed by channel rules, sliced, and lifted to a module again."""
