"""lipdp: differentially private training of Lipschitz networks, without per-sample gradient clipping."""
