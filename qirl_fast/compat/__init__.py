"""Other trainers' functions, with their own signatures, on this project's ops."""
