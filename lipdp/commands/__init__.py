"""The `lipdp` command, one module a subcommand; heavy imports wait until a subcommand runs."""
