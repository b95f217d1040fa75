# For current Packer releases, which take plugins from `packer init`; Packer 1.6 (Debian) has them built in and refuses this
# block. Use it with: packer init packer/plugins
packer {
  required_plugins {
    ansible = {
      source  = "github.com/hashicorp/ansible"
      version = ">= 1.1.3"
    }
    qemu = {
      source  = "github.com/hashicorp/qemu"
      version = ">= 1.1.0"
    }
  }
}
