def prepare(*a):
    raise NotImplementedError
