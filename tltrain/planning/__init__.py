"""Decided and shown before the first step: where views are made, whether compiling pays, what the network will see."""
