"""The library ``datasets``. It takes a second to import, so functions that need it import it from here."""

import datasets as datasets

from fedsmoothlora.logs import take_hold_of_datasets

take_hold_of_datasets()
