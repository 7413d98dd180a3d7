dev:
	@.venv/bin/cmake --build build/cpython-311-torch2.13.0+cpu && .venv/bin/cmake --install build/cpython-311-torch2.13.0+cpu --prefix pycnf
