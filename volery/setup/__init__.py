"""What `make up`, `make down` and `make clean` do around the programs themselves."""
