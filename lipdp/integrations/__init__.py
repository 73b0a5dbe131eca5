"""Trainers people use: what lipdp adds for them. They run a private model as it is; see docs/integrations.md."""
