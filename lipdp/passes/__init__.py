"""The passes of a user's loop, from a draw to a step: which are private, and the one sum of their gradients."""
