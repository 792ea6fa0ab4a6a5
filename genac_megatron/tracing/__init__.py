"""`genac traces`: a critic's SFT data from any teacher; answers are kept as they come, filtered later."""
