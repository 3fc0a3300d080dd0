"""The vocabulary: records, errors, statistics, cost arithmetic. numpy, msgspec and the standard library; never torch."""
