"""Adapters beside layers that several processes share: tensor, sequence and expert parallelism."""
