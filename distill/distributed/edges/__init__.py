"""Edges between ranks: how boundaries travel from a sender to a receiver, over sockets, NCCL or shared memory."""
