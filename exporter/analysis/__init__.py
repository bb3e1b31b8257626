"""What a bundle does on given texts: gate, mixes, experts, compression and cost, measured; see docs/analyze.md."""
