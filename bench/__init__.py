"""Speed of fusedstep against rooflines and peers: `make bench`, see README.md."""
