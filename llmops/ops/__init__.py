"""The operators' front doors, one module each: public function, checks, schema, autograd."""
