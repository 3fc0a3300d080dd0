"""The vocabulary: records, errors, statistics, costs. Imports numpy, msgspec and the standard library, never torch."""
