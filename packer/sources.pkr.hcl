# A root tree served over SSH by a light host on this machine: provisioning runs at native speed, no VM is needed.
# Nothing is booted in it, so roles install and enable but start nothing.
source "null" "tree" {
  communicator         = "ssh"
  ssh_host             = var.ssh_host
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_key_file
  ssh_timeout          = "2m"
}

# The same tree as the disk of a virtual machine, under KVM or emulation: its own kernel, and an SSH server as the only process
# (saw.image.machine), so that nothing is booted in it either. It has no network but that one port.
source "qemu" "machine" {
  disk_image           = true
  iso_url              = var.machine_disk
  iso_checksum         = var.machine_disk_checksum
  skip_resize_disk     = true
  format               = "qcow2"
  vm_name              = "machine.qcow2"
  output_directory     = var.machine_output
  machine_type         = "q35"
  accelerator          = var.machine_accelerator
  cpus                 = var.machine_cpus
  memory               = var.machine_memory
  headless             = true
  disable_vnc          = true
  boot_wait            = "1s"
  communicator         = "ssh"
  ssh_username         = "root"
  ssh_private_key_file = var.ssh_key_file
  ssh_timeout          = "20m"
  shutdown_command     = "kill -TERM 1"
  shutdown_timeout     = "10m"

  qemuargs = [
    ["-cpu", var.machine_cpu],
    ["-kernel", var.machine_kernel],
    ["-append", var.machine_command_line],
    ["-display", "none"],
    ["-nodefaults"],
    ["-no-reboot"],
    ["-serial", "file:${var.machine_output}/console.log"],
    ["-drive", "if=none,id=root,file=${var.machine_output}/machine.qcow2,format=qcow2,cache=unsafe,discard=unmap"],
    ["-device", "nvme,drive=root,serial=root"],
    ["-device", "virtio-net-pci,netdev=user.0,romfile="],
    ["-netdev", "user,id=user.0,restrict=on,hostfwd=tcp:127.0.0.1:{{ .SSHHostPort }}-:22"],
    ["-object", "rng-random,id=random,filename=/dev/urandom"],
    ["-device", "virtio-rng-pci,rng=random"],
  ]
}
