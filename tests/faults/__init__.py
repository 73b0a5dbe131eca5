"""Real processes of the `lipdp` command that are killed where the test says: see `server` and `client`."""
