"""Post-training quantisation, simulated exactly as integers would compute it (design, section 3)."""
